"""``python -m obfuscatune.cli``: the command line without its console script."""

import sys

from obfuscatune.cli import main

if __name__ == "__main__":
    sys.exit(main())
