"""``python -m obfuscatune``: the command line without its console script, for torchrun too."""

import sys

from obfuscatune.cli import main

if __name__ == "__main__":
    sys.exit(main())
