"""Parts of a log become one snapshot, sorted and distinct, in bounded memory."""
