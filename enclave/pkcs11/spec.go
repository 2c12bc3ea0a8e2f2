package pkcs11

import (
	"fmt"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/kmsd-project/kmsd/enclave"
)

// Guard is the way in which a slot is guarded.
type Guard string

// The ways of guarding.
const (
	Wrapped Guard = "wrapped" // encrypted by an AES-256 key of the token
	Agreed  Guard = "agreed"  // encrypted under what a P-256 key of the token agrees on
)

// Limits of a Spec, in bytes.
const (
	maxModule = 1024
	maxLabel  = 32 // CK_TOKEN_INFO.label (PKCS#11 2.40 base section 3.2)
	maxSerial = 16 // CK_TOKEN_INFO.serialNumber
)

// Spec says which token, and how new slots are made.
type Spec struct {
	Module string // absolute path of the PKCS#11 module
	Token  string // label of the token; may be empty when there is a serial
	Serial string // serial number of the token; may be empty when there is a label

	// Guard is how new slots are guarded; Wrapped when empty. It matters at enrolment only.
	Guard Guard
	// FinalTry allows to spend the last attempt that the token has left before it locks its PIN. It is not remembered in the location.
	FinalTry bool
}

// The names of the parameters in a spec and on the way to the helper.
const (
	paramModule   = "module"
	paramToken    = "token"
	paramSerial   = "serial"
	paramGuard    = "guard"
	paramFinalTry = "final-try"
)

// ParseSpec reads pkcs11:MODULE?token=LABEL&serial=SERIAL&guard=agreed&final-try=yes. At least one of token and serial is there; values are
// percent-encoded where they need to be (RFC 3986 section 2.1). Errors wrap enclave.ErrMisconfigured.
func ParseSpec(text string) (Spec, error) {
	rest, ok := strings.CutPrefix(text, Kind+":")
	if !ok {
		return Spec{}, badSpec("%.100q does not begin with %s:", text, Kind)
	}
	module, query, _ := strings.Cut(rest, "?")
	values, err := url.ParseQuery(query)
	if err != nil {
		return Spec{}, badSpec("options of %.100q: %v", text, err)
	}
	params := map[string]string{paramModule: module}
	for name, all := range values {
		if len(all) != 1 || name == paramModule {
			return Spec{}, badSpec("option %.32q is there more than once or is none", name)
		}
		params[name] = all[0]
	}
	return SpecOf(params)
}

// SpecOf is what reaches the helper: the parameters that Dial was given the Spec as. Errors wrap enclave.ErrMisconfigured.
func SpecOf(params map[string]string) (Spec, error) {
	var s Spec
	for name, v := range params {
		switch name {
		case paramModule:
			s.Module = v
		case paramToken:
			s.Token = v
		case paramSerial:
			s.Serial = v
		case paramGuard:
			s.Guard = Guard(v)
		case paramFinalTry:
			if v != "yes" && v != "no" {
				return Spec{}, badSpec("%s=%.32q is neither yes nor no", name, v)
			}
			s.FinalTry = v == "yes"
		default:
			return Spec{}, badSpec("unknown option %.32q", name)
		}
	}
	return s, s.Check()
}

// Check refuses a Spec that names no token. Errors wrap enclave.ErrMisconfigured.
func (s Spec) Check() error {
	switch {
	case !filepath.IsAbs(s.Module) || filepath.Clean(s.Module) != s.Module || len(s.Module) > maxModule:
		return badSpec("module %.200q: name it by its whole path", s.Module)
	case s.Token == "" && s.Serial == "":
		return badSpec("name the token by its label or its serial: %s:%s?token=LABEL", Kind, s.Module)
	case len(s.Token) > maxLabel || len(s.Serial) > maxSerial:
		return badSpec("a label has at most %d bytes and a serial at most %d", maxLabel, maxSerial)
	case strings.ContainsRune(s.Module+s.Token+s.Serial, 0):
		return badSpec("zero byte in module, label or serial")
	case s.Guard != "" && s.Guard != Wrapped && s.Guard != Agreed:
		return badSpec("way of guarding %.32q: there are %s and %s", string(s.Guard), Wrapped, Agreed)
	}
	return nil
}

// Location is the spec without what is said for the moment only, in the one form that ParseSpec gives back.
func (s Spec) Location() string {
	s.Guard, s.FinalTry = "", false
	query := url.Values{}
	for name, v := range s.params() {
		if name != paramModule {
			query.Set(name, v)
		}
	}
	return Kind + ":" + s.Module + "?" + query.Encode()
}

func (s Spec) params() map[string]string {
	p := map[string]string{paramModule: s.Module}
	if s.Token != "" {
		p[paramToken] = s.Token
	}
	if s.Serial != "" {
		p[paramSerial] = s.Serial
	}
	if s.Guard != "" {
		p[paramGuard] = string(s.Guard)
	}
	if s.FinalTry {
		p[paramFinalTry] = "yes"
	}
	return p
}

func badSpec(format string, args ...any) error {
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf(format, args...),
		Remedy: "write pkcs11:MODULE?token=LABEL"}
}
