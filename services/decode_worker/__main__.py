"""A worker of the decode pool: `python -m services.decode_worker`, configured by BATON_* variables.

It differs from other workers in what it advertises: decode jobs, unless `takes` says otherwise.
"""

from shared.worker.host import main

if __name__ == "__main__":
    main("decode")
