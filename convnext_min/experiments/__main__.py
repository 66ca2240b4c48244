"""Start `convnext_min.experiments.run`: `python -m convnext_min.experiments road --output book/results`."""

from convnext_min.experiments.run import main

if __name__ == "__main__":
    main()
