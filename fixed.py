"""The trainer under a shorter name, `python fixed.py --epochs 10`.

It is trainloop_complete_with_fixes.py.
"""

from command_line import leave
from trainloop_complete_with_fixes import main

if __name__ == "__main__":
    leave(main())
