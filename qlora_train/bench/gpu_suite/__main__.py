"""`python -m qlora_train.bench.gpu_suite`; see command.py."""

import sys

from qlora_train.bench.gpu_suite.command import main

sys.exit(main())
