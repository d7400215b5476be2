"""The console command: `cellflux-bridge COMMAND CONFIG_OR_RUN [key.sub=value ...]`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import errno
import os
import signal
import sys
from collections.abc import Sequence

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.parse import parse

# What a full disk, a limit on the size of files, a missing right, or a file where a folder should be (or the reverse)
# answers.
_USERS_ERRNO = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends with its message and status 1, a signal with 128 + its number."""
    try:
        command, function, args = parse(sys.argv[1:] if argv is None else argv)
        if command.shared or os.environ.get("RANK", "0") == "0":  # torchrun gives every process a rank
            from cellflux_bridge.config.registry import trusting

            with trusting(args.trust):
                function(args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        if error.errno not in _USERS_ERRNO:
            raise
        raise SystemExit(f"error: cannot access {error.filename or 'a file'}: {error.strerror}") from None
    except Exception as error:
        code = getattr(error, "code", None)  # training.loop.Stopped, without importing torch for it
        if type(error).__name__ != "Stopped":
            raise
        print(error, file=sys.stderr)
        raise SystemExit(code) from None


def script(command: str) -> None:
    """Run a command with the arguments of the script that calls this."""
    main([command, *sys.argv[1:]])
