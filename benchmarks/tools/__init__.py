"""Programs beside the timings: reports of machine code, comparison of runs, a GPU run, scale."""
