"""Which weights hold what is to be forgotten: Fishers, and the masks made of them."""
