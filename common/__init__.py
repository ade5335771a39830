"""Helpers for all other packages: errors, files, pictures, log, seeds."""

import sys

if sys.platform == "win32":  # every command imports this package first: file locks and signals are those of Unix
    sys.stderr.write(
        "error: these commands do not run on Windows itself. Run them in WSL, the Linux inside of Windows: "
        "install that, and this project in it.\n"
    )
    sys.exit(2)
