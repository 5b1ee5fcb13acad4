//! Guest RAM and the mapping layer.
