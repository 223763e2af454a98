import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the naive reference stands beside the tests that compare with it
