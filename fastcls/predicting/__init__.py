"""A model in whatever process needs it: what is asked as plain values, loaded once a machine, over tables of Arrow."""
