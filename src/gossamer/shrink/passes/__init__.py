"""One file a pass; `gossamer.shrink.base` says what a pass is, and finds them here."""
