import sys

from data_pipeline.prepare.cli import main

if __name__ == "__main__":
    sys.exit(main())
