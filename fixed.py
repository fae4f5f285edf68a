"""The trainer under a shorter name, `python fixed.py --epochs 10`.

It is trainloop_complete_with_fixes.py.
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    script = Path(__file__).resolve().with_name("trainloop_complete_with_fixes.py")
    runpy.run_path(str(script), run_name="__main__")
