"""What all tests share: helpers next to this file can be imported by name."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# What somebody tuned on this machine must not decide what the tests see.
os.environ["NVRAR_TUNE_TABLE"] = "off"
