"""`python -m sfumato`: the command without an installed script."""

import sys

from sfumato.cli import main

sys.exit(main())
