"""The codec: the packed format and a reference implementation of it; imports numpy only."""
