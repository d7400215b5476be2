"""`cellflux-bridge cellularity`"""

import argparse
import math

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import configuration, tell_written, trajectories_and_overrides


def run(args: argparse.Namespace) -> None:
    """cellularity TRAJECTORY_OR_RUN ...: count nuclei along the levels, beside real patches of both classes.

    With --images, --annotated or --label-maps: of a folder's images, against annotated cellularity, or label maps.
    """
    from cellflux_bridge.cellularity.nuclei import Parameters

    if args.mpp is not None and not 0.01 <= args.mpp <= 100:
        raise UserError(f"--mpp {args.mpp}: expected microns per pixel, 0.01 to 100")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected a number of processes, or 0 for one a core")
    other = {"--images": args.images, "--annotated": args.annotated, "--label-maps": args.label_maps}
    asked = [flag for flag, given in other.items() if given is not None]
    if len(asked) + (args.config is not None) != 1:
        raise UserError(f"expected trajectories or one of {', '.join(other)}; given: {', '.join(asked) or 'nothing'}")
    if args.instanseg is not None and not args.instanseg.is_file():
        raise UserError(
            f"--instanseg {args.instanseg}: no such file; expected InstanSeg's TorchScript file, instanseg.pt"
        )
    if args.instanseg is not None and args.method == "classical":
        raise UserError("--method classical: goes without --instanseg, which finds the nuclei itself; leave one out")
    method = "instanseg" if args.instanseg is not None else args.method
    for flag, given, wanted in (
        ("--stains", args.stains != "red", "classical"),
        ("--model", args.model is not None, "network"),
        ("--device", args.device != "cpu", "network"),
    ):
        if given and method != wanted:
            raise UserError(f"{flag}: goes with --method {wanted}, but nuclei are found by {method}; leave it out")
    files = {"instanseg": str(args.instanseg or ""), "model": str(args.model or "")}
    parameters = Parameters(method=method, stains=args.stains, device=args.device, **files)
    if method == "network":
        from cellflux_bridge.cellularity.network import read_weights, require_device

        require_device(args.device)
        read_weights(parameters.model)  # an error before anything is counted
    if args.device != "cpu":
        args.workers = 1  # one process on a GPU
    if args.config is None:
        for flag, given in (("--real-source", args.real_source), ("--real-target", args.real_target)):
            if given is not None:
                raise UserError(f"{flag}: goes with trajectories, not with {asked[0]}")
        if args.diameter is not None and (args.label_maps is None or not 1 < args.diameter < 1000):
            raise UserError(f"--diameter {args.diameter}: expected px, above 1, together with --label-maps")
        if args.nuclei is not None and args.images is None:
            raise UserError(f"--nuclei: goes with --images, not with {asked[0]}")
        if args.output is not None and args.images is None:
            raise UserError(f"--output: {asked[0]} prints its figures and writes nothing")
        _cellularity_of_images(args, parameters)
        return
    from cellflux_bridge.base.files import require_json
    from cellflux_bridge.cellularity.along import along_trajectories
    from cellflux_bridge.cellularity.export import summary, write_results

    folders, overrides = trajectories_and_overrides(args)
    output = args.output or folders[0] / "cellularity.json"
    require_json(output)
    if (args.real_source is None) != (args.real_target is None):
        raise UserError("--real-source and --real-target: give both folders, or neither")
    patches = None
    if args.real_source is None and (folders[0] / "config.yaml").exists():
        from cellflux_bridge.data.patches import load_patches

        config = configuration(folders[0], overrides)
        patches = load_patches(config.data, seed=config.seed)
    elif overrides:
        raise UserError(f"{overrides[0]}: the trajectory has no configuration to override, or real folders are given")
    content = along_trajectories(
        folders,
        patches=patches,
        real_folders=None if args.real_source is None else (args.real_source, args.real_target),
        mpp=args.mpp,
        parameters=parameters,
        workers=args.workers,
    )
    files = write_results(content, output)
    print(summary(content))
    tell_written(files)


def _cellularity_of_images(args: argparse.Namespace, parameters) -> None:
    from cellflux_bridge.cellularity import counting, validation
    from cellflux_bridge.cellularity.measurement import MIN_PIXELS

    if args.images is not None:
        output = args.output or args.images.with_name(f"{args.images.name}_nuclei.csv")
        options = {"mpp": args.mpp, "parameters": parameters, "nuclei": args.nuclei, "workers": args.workers}
        tally = counting.write_counts(args.images, output, **options)
        if tally.too_small:
            print(f"{tally.too_small} images: nuclei under {MIN_PIXELS:g} px, counts are left out")
        if tally.unmeasured:
            print(f"{tally.unmeasured} images: could not be measured; the column reason says why")
        print(f"wrote: {output}")
    elif args.annotated is not None:
        found = validation.agree(args.annotated, mpp=args.mpp, parameters=parameters, workers=args.workers)
        print(f"{args.annotated}: {found.n} images")
        for name, one in zip(found._fields[1:], found[1:], strict=True):
            print(f"  {name:<20} {one.value:.3f} [{one.low:.3f}, {one.high:.3f}]")
    else:
        _, groups, compared = validation.score_label_maps(
            args.label_maps, mpp=args.mpp, parameters=parameters, diameter=args.diameter, workers=args.workers
        )
        for group in ["all", *(sorted(set(groups)) if len(set(groups)) > 1 else [])]:
            chosen = [one for one, of in zip(compared, groups, strict=True) if group in ("all", of)]
            values = validation.score(chosen)._asdict().items()
            shown = (f"{name} {'undefined' if math.isnan(value) else f'{value:.4g}'}" for name, value in values)
            print(f"{group}: " + "  ".join(shown))
        if num_masks := sum(one.was_mask for one in compared):
            print(f"{num_masks} label maps are masks without numbers: their connected parts were taken for nuclei")
