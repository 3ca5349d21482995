"""A worker of the prefill pool: `python -m services.prefill_worker`, configured by BATON_* variables.

It differs from other workers in what it advertises: prefill jobs, unless `takes` says otherwise.
"""

from shared.worker.host import main

if __name__ == "__main__":
    main("prefill")
