"""`python -m convnext_min.train`."""

from convnext_min.train import main

if __name__ == "__main__":
    main()
