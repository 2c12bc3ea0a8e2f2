package keyspec

// Limits of what is said about one key. They are the same on the wire, in the engine and in the store, and so small that
// the description of a key, all versions included, always fits a control frame of 64 KiB.
const (
	MaxLabels     = 32
	MaxLabelName  = 64      // bytes
	MaxLabelValue = 256     // bytes
	MaxLabelBytes = 4 << 10 // names and values of all labels of a key together
	MaxUsableVia  = 16      // bridges that may use a key
	MaxBridgeName = 64      // bytes
	MaxVersions   = 256     // of one key, tombstones included
)

// Limits of the keystore.
const (
	MaxSlots      = 32
	MaxLocation   = 1 << 10 // bytes of the location of a slot's device
	MaxRecipients = 10      // of a backup, and as many of the escrow
	MaxRecipient  = 2 << 10 // bytes of an age recipient; hybrid ones take 1,960
)
