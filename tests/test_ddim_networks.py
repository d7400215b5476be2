"""The networks of DDIM stairs, guided-diffusion's checkpoint layout, and the variational bound."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchcfm.models.unet.unet import EncoderUNetModel, UNetModel
from toy_ddim import TINY, random, shuffled

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import load_config
from cellflux_bridge.ddim.networks import Denoiser, NoisyClassifier, load_foreign
from cellflux_bridge.ddim.schedule import add_noise
from cellflux_bridge.ddim.variational import step_bound

# --- networks and foreign weights -------------------------------------------------------------------------------------


def guided_diffusion_unet(*, channels=32, classes=2, out=3, order=False) -> UNetModel:
    return UNetModel(
        image_size=16,
        in_channels=3,
        model_channels=channels,
        out_channels=out,
        num_res_blocks=1,
        attention_resolutions=[2],
        channel_mult=(1, 1),
        num_classes=classes,
        num_head_channels=16,
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=order,
    )


def denoiser(*, size=16, classes=2, learn_sigma=False, has_null=False, **changes) -> Denoiser:
    config = TINY.model_copy(update=changes)
    return Denoiser(config, image_size=size, num_classes=classes, learn_sigma=learn_sigma, has_null=has_null)


def saved(folder: Path, network: nn.Module) -> Path:
    torch.save(network.state_dict(), folder / "model000100.pt")
    return folder / "model000100.pt"


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_guided_diffusion_denoisers_load(tmp_path, learn_sigma):
    theirs = shuffled(guided_diffusion_unet(out=6 if learn_sigma else 3))
    ours = denoiser(learn_sigma=learn_sigma).eval()
    load_foreign(lambda: ours, saved(tmp_path, theirs), key="ddim.denoiser")
    x, tau, y = random(2, 3, 16, 16, dtype=torch.float32), torch.tensor([0, 990]), torch.tensor([1, 0])
    with torch.no_grad():
        assert torch.equal(ours.eps(x, tau, y), theirs(tau, x, y)[:, :3])
        assert ours(x, tau, y).shape[1] == (6 if learn_sigma else 3)


def test_guided_diffusion_classifiers_load(tmp_path):
    theirs = shuffled(
        EncoderUNetModel(
            image_size=16,
            in_channels=3,
            model_channels=32,
            out_channels=3,
            num_res_blocks=1,
            attention_resolutions=[2],
            channel_mult=(1, 1),
            num_head_channels=16,
            use_scale_shift_norm=True,
            resblock_updown=True,
            pool="attention",
        )
    )
    ours = NoisyClassifier(TINY, image_size=16, num_classes=3).eval()
    load_foreign(lambda: ours, saved(tmp_path, theirs), key="ddim.classifier")
    x, tau = random(2, 3, 16, 16, dtype=torch.float32), torch.tensor([0, 990])
    with torch.no_grad():
        assert torch.equal(ours(x, tau), theirs(x, tau))
    large = TINY.model_copy(update={"attention": (16,)})
    for other, message in (
        (NoisyClassifier(TINY, image_size=16, num_classes=2), "3 classes in the file, 2 in the configuration"),
        (NoisyClassifier(large, image_size=32, num_classes=3), r"65 places in the innermost map .* 257"),
    ):
        with pytest.raises(UserError, match=message):
            load_foreign(lambda other=other: other, tmp_path / "model000100.pt", key="ddim.classifier")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 64}, "32 channels .* in the file, 64 in the configuration"),
        ({"channels": 320_000}, "32 channels .* in the file, 320000 in the configuration"),  # takes no memory
        ({"classes": 3}, "2 classes .* in the file, 3 in the configuration"),
        ({"has_null": True}, "2 classes .*null class.* in the file, 3 in the configuration"),
        ({"learn_sigma": True}, "3 output channels .*learn_sigma.* in the file, 6 in the configuration"),
        ({"blocks": 2}, "tensors missing"),
        ({"resblock_updown": False}, "tensors unknown"),
    ],
)
def test_other_architectures_are_named(tmp_path, changes, message):
    file = saved(tmp_path, guided_diffusion_unet())
    with pytest.raises(UserError, match=f"model000100.pt is of another architecture than ddim.denoiser.*{message}"):
        load_foreign(lambda: denoiser(**changes), file, key="ddim.denoiser")


def test_what_is_no_state_dict_of_tensors_is_refused(tmp_path):
    net = denoiser().net
    file = tmp_path / "model.pt"
    with pytest.raises(UserError, match="is not there"):
        load_foreign(denoiser, file, key="ddim.denoiser")
    torch.save({"net": net}, file)
    with pytest.raises(UserError, match="more than tensors, which is not loaded because it could run"):
        load_foreign(denoiser, file, key="ddim.denoiser")
    file.write_bytes(pickle.dumps(Path("x"), protocol=2))
    with pytest.raises(UserError, match="more than tensors"):
        load_foreign(denoiser, file, key="ddim.denoiser")
    torch.save({"state_dict": net.state_dict()}, file)
    with pytest.raises(UserError, match="expected a flat state dict"):
        load_foreign(denoiser, file, key="ddim.denoiser")
    saved(tmp_path, net).rename(file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is damaged"):
        load_foreign(denoiser, file, key="ddim.denoiser")


def test_the_attention_order_changes_images_but_no_shape(tmp_path, patch_folder, write_config):
    theirs = shuffled(guided_diffusion_unet(order=True))
    right, wrong = denoiser(new_attention_order=True).eval(), denoiser(new_attention_order=False).eval()
    x, tau, y = random(2, 3, 16, 16, dtype=torch.float32), torch.tensor([0, 990]), torch.tensor([1, 0])
    file = saved(tmp_path, theirs)
    for ours, same in ((right, True), (wrong, False)):
        load_foreign(lambda ours=ours: ours, file, key="ddim.denoiser")
        with torch.no_grad():
            assert torch.equal(ours.eps(x, tau, y), theirs(tau, x, y)) == same
    config = write_config(tmp_path, ddim={"denoiser": {"weights": str(file)}})
    with pytest.raises(UserError, match=r"ddim\.denoiser: weights need new_attention_order stated"):
        load_config(config)
    stated = load_config(config, ["ddim.denoiser.new_attention_order=true"])
    assert stated.ddim.denoiser.new_attention_order
    with pytest.raises(UserError, match="source_denoiser needs weights"):
        load_config(write_config(tmp_path, ddim={"source_denoiser": {"channels": 32}}))


def test_cellflows_class_network_becomes_rows_of_a_table(tmp_path):
    net = shuffled(guided_diffusion_unet(classes=2))
    class_emb = shuffled(nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128)), seed=9)
    weights = net.state_dict() | {f"class_emb.{name}": value for name, value in class_emb.state_dict().items()}
    torch.save(weights, tmp_path / "model.pt")
    ours = denoiser(has_null=True).eval()
    load_foreign(lambda: ours, tmp_path / "model.pt", key="ddim.denoiser")
    x, tau = random(2, 3, 16, 16, dtype=torch.float32), torch.tensor([20, 600])
    with torch.no_grad():
        for y, row in (
            (torch.tensor([1, 0]), class_emb(net.label_emb(torch.tensor([1, 0])))),
            (torch.tensor([2, 2]), 0),
        ):
            net.label_emb.forward = lambda labels, row=row: row
            torch.testing.assert_close(ours.eps(x, tau, y), net(tau, x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (24, {"multipliers": (1, 1, 1, 1, 1)}, "image_size=24: not divisible by 16"),
        (16, {"attention": (4,)}, r"no map of side 4 px at 16 px; sides: \[16, 8\]"),
        (16, {"head_channels": 24}, "head_channels: 24 does not divide the width 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, changes, message):
    with pytest.raises(UserError, match=message):
        denoiser(size=size, **changes)


def test_multipliers_are_fractions_where_the_groups_allow_it(tmp_path, write_config):
    file = write_config(tmp_path, ddim={"denoiser": {"channels": 64, "multipliers": [0.5, 1.5]}})
    assert load_config(file).ddim.denoiser.widths == (32, 96)
    whole = load_config(file, ["ddim.denoiser.multipliers=[1, 2]"]).ddim.denoiser.multipliers
    assert [(type(multiplier), multiplier) for multiplier in whole] == [(int, 1), (int, 2)]  # as hashes have them
    for wrong, message in (
        ("[0.25, 1]", "times channels .64. they must give multiples of 32"),
        ("[0, 1]", "greater than 0"),
        ("[]", "at least 1 item"),
        ("[-1]", "greater than 0"),
    ):
        with pytest.raises(UserError, match=rf"ddim\.denoiser\.multipliers.*{message}"):
            load_config(file, [f"ddim.denoiser.multipliers={wrong}"])


def test_a_source_denoiser_is_like_the_denoiser_where_it_says_nothing_else(tmp_path, write_config):
    file = write_config(tmp_path, ddim={"denoiser": {"channels": 64, "blocks": 3, "new_attention_order": True}})
    weights = "ddim.source_denoiser.weights=s.pt"
    with pytest.raises(UserError, match="weights need new_attention_order stated"):
        load_config(file, [weights])
    stated = [weights, "ddim.source_denoiser.new_attention_order=false", "ddim.source_denoiser.blocks=2"]
    source = load_config(file, stated).ddim.source_denoiser
    assert (source.channels, source.blocks, source.new_attention_order) == (64, 2, False)
    assert source.weights == Path("s.pt")


# --- the variational bound --------------------------------------------------------------------------------------------


def test_the_bound_is_zero_for_the_true_posterior_and_a_known_divergence_else():
    x0, noise = random(4, 3, 4, 4).tanh(), random(4, 3, 4, 4, seed=1)
    for tau in (1, 10, 700):
        steps = torch.full((4,), tau)
        x_t = add_noise(x0, noise, steps)
        low, high = -torch.ones_like(x0), torch.ones_like(x0)
        assert step_bound(x0, x_t, steps, noise, low).item() == pytest.approx(0, abs=1e-9)
        abar, beta = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), np.linspace(1e-4, 0.02, 1000)
        posterior = beta[tau] * (1 - abar[tau - 1]) / (1 - abar[tau])
        ratio = posterior / beta[tau]
        expected = 0.5 * (ratio - 1 - np.log(ratio)) / np.log(2)
        assert step_bound(x0, x_t, steps, noise, high).item() == pytest.approx(expected, rel=1e-6)
        # An error of the noise moves the mean by beta / sqrt(1 - beta) / sqrt(1 - abar) times it.
        moved = beta[tau] / np.sqrt(1 - beta[tau]) / np.sqrt(1 - abar[tau]) * 0.1
        expected = 0.5 * moved**2 / posterior / np.log(2)
        assert step_bound(x0, x_t, steps, noise + 0.1, low).item() == pytest.approx(expected, rel=1e-6)


def test_the_first_step_is_a_likelihood_of_256_values():
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None, None, None]
    x_t = torch.full_like(values, 0.1)
    steps = torch.zeros(256, dtype=torch.long)
    for v in (-1.0, 1.0):
        bits = [
            step_bound(values[i : i + 1], x_t[:1], steps[:1], x_t[:1], torch.full((1, 1, 1, 1), v)) for i in range(256)
        ]
        assert sum(2 ** -b.item() for b in bits) == pytest.approx(1, abs=1e-6)


def test_only_the_variance_is_trained_by_the_bound():
    x0, noise = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    tau = torch.tensor([0, 300])
    eps, v = random(2, 3, 4, 4, seed=2).requires_grad_(), torch.zeros(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    step_bound(x0, add_noise(x0, noise, tau), tau, eps, v).backward()
    assert eps.grad is None
    assert (v.grad.abs().sum((1, 2, 3)) > 0).all()
