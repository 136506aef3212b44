"""`python -m qlora_train` is `qlora-train`."""

import sys

from qlora_train.cli import main

sys.exit(main())
