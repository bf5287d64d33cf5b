import sys

from data_pipeline.verify import main

if __name__ == "__main__":
    sys.exit(main())
