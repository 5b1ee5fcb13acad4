//! Property tests of the whole layer.
