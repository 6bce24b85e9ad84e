"""Data sets (TFDS, array_record, no tensorflow) and the grain pipeline that reads them."""
