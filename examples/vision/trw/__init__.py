"""TRW: a class is forgotten by learning what a model that never saw it would say."""
