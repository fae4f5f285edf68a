"""The trainer under a shorter name, `python fixed.py --epochs 10`; installed, `arc-efe-train`.

It is trainloop_complete_with_fixes.py.
"""

import runpy
from pathlib import Path


def main() -> None:
    """Run the script as if it had been called itself: --help comes before any slow import."""
    script = Path(__file__).resolve().with_name("trainloop_complete_with_fixes.py")
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
