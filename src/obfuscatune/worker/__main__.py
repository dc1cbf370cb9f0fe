"""Start a worker: ``python -m obfuscatune.worker --listen ADDRESS``, or on a socket that is inherited.

The process that is started with ``--listen`` stands around the worker's own (`outside`), and needs no torch.
"""

import argparse
import logging
import sys
from typing import get_args

from obfuscatune.errors import ObfuscatuneError
from obfuscatune.worker import outside, sandbox


def main() -> int:
    """Parse the options and serve; 2 for misuse."""
    parser = argparse.ArgumentParser(prog="python -m obfuscatune.worker", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--listen", metavar="ADDRESS", help="unix://PATH or tcp://HOST:PORT")
    where.add_argument("--fd", type=int, help="an inherited, connected socket; no sandbox is made around it")
    where.add_argument("--follow", action="store_true", help="what torchrun's other processes do")
    where.add_argument("--listener", type=int, metavar="FD", help="an inherited, listening socket; no sandbox either")
    parser.add_argument("--credentials", type=int, metavar="FD", help="an inherited pipe: makes --listener's link TLS")
    parser.add_argument("--device", default="cpu", help="for instance cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, help="CPU threads of each session; torch's default otherwise")
    parser.add_argument("--max_sessions", type=int, default=1, help="enclaves served at once; others wait")
    parser.add_argument("--memory_gb", type=float, help="of each session; what is free, in equal shares, otherwise")
    parser.add_argument("--sandbox", choices=get_args(sandbox.Mode), default="auto", help="around the worker")
    parser.add_argument("--insecure", action="store_true", help="tcp:// beyond this machine")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        if options.listen is not None:
            arguments = outside.arguments_of(options.threads, options.max_sessions, options.memory_gb)
            return outside.run(
                listen_on=options.listen,
                arguments=arguments,
                device=options.device,
                mode=options.sandbox,
                insecure=options.insecure,
            )
        from obfuscatune.worker import inside  # with torch

        inside.run(options)
    except ObfuscatuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
