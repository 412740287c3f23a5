"""`python -m jaxwna16` is the command `jaxwna16`."""

import sys

from jaxwna16.cli.main import main

sys.exit(main())
