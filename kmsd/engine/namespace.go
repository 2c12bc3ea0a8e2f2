package engine

// Escrow says who can restore the base keys below a module key that is in a device.
type Escrow string

// The kinds of escrow.
const (
	EscrowRecipients Escrow = "recipients" // the recipients of a backup, on any machine
	EscrowNone       Escrow = "none"       // nobody: the keys die with the device
)
