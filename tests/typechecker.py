"""The checker that reads shape annotations at test time; an int is a float to it, as to every static checker."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
