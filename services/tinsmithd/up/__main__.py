"""`python -m tinsmithd.up`: the same as `tinsmith up`."""

from tinsmithd.up.command import main

if __name__ == "__main__":
    main()
