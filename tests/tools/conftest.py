import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # tools/ is no part of the package, so nothing else finds it
