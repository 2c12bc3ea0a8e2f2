// Package mosipdb reads what a deployment of MOSIP Key Manager keeps in its database, and finds out which keys that makes: which rows
// belong together, which generation of a key is which, and what is wrong with the rest.
//
// It takes a plain dump of PostgreSQL (COPY text) and CSV with a header. It reads rows as a stream, and keeps of them what is needed to
// import the keys. It sees no private key: those in the rows are encrypted under module keys, which it does not have.
package mosipdb

import "errors"

// Limits of what is read. They are far above what MOSIP's own columns hold.
const (
	MaxRow     = 1 << 20   // bytes of one row, as it is written
	MaxRows    = 4_000_000 // rows of all tables together
	MaxColumns = 64        // of one table
	maxField   = 256 << 10 // bytes of one field
	maxReason  = 240       // bytes of the reason in a Problem
)

// ErrFormat says that a file as a whole cannot be read: it is no dump and no CSV that we know. What is wrong with single rows is a Problem.
var ErrFormat = errors.New("this is no dump and no CSV of a key manager's database")

// Table is one of the tables that are read.
type Table string

// The tables, as MOSIP names them.
const (
	KeyAlias     Table = "key_alias"
	KeyStore     Table = "key_store"
	KeyPolicy    Table = "key_policy_def"
	CACerts      Table = "ca_cert_store"
	PartnerCerts Table = "partner_cert_store"
	RandomKeys   Table = "data_encrypt_keystore"
)

// required are the columns without which a row of a table says nothing. They also tell the tables apart when a CSV has no other name.
var required = []struct {
	table   Table
	columns []string
}{
	{KeyAlias, []string{"id", "app_id", "ref_id", "key_gen_dtimes", "key_expire_dtimes"}},
	{KeyStore, []string{"id", "master_key", "private_key", "certificate_data"}},
	{KeyPolicy, []string{"app_id", "key_validity_duration"}},
	{PartnerCerts, []string{"cert_id", "partner_domain", "cert_data", "organization_name"}},
	{CACerts, []string{"cert_id", "partner_domain", "cert_data"}},
	{RandomKeys, []string{"id", "key", "key_status"}},
}
