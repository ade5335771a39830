"""New masks: simulated nuclei, or the cells of given masks arranged anew."""
