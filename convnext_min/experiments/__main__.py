"""`python -m convnext_min.experiments`."""

from convnext_min.experiments import main

if __name__ == "__main__":
    main()
