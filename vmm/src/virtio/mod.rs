//! virtio over PCI.
