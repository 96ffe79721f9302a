"""`python -m gpumanager`."""

from gpumanager.cli import main

if __name__ == "__main__":
    main()
