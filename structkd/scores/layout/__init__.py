"""Files of a store: sealed parquet, parts and their log, snapshots, ids, and how scores are found in them."""
