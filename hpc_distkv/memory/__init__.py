"""Who holds which rBlock, and the bytes of the rBlocks."""
