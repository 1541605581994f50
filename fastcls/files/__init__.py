"""Files of texts, read in bounded memory. `sources.open_sources` is the way in; pyarrow is imported only there."""
