"""`python -m benchmarks.gpu_suite`; see command.py."""

import sys

from benchmarks.gpu_suite.command import main

sys.exit(main())
