package keyspec

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Limits of a key name, in bytes.
const (
	MaxApplication = 36
	MaxReference   = 128 // all segments after the first, with the slashes between them
	MaxName        = MaxApplication + 1 + MaxReference
)

// Name is a key name: application[/reference...]. The first segment is the namespace.
// A segment is one or more of A-Z a-z 0-9 . _ : and -.
type Name string

// ParseName returns s as a Name or an error that wraps ErrName.
func ParseName(s string) (Name, error) {
	application, reference, hasReference := strings.Cut(s, "/")
	if len(application) > MaxApplication || len(reference) > MaxReference {
		return "", fmt.Errorf("%w: application is at most %d and references at most %d characters", ErrName, MaxApplication, MaxReference)
	}
	if !validSegment(application) {
		return "", fmt.Errorf("%w %q: use application[/reference], segments of A-Z a-z 0-9 . _ : -", ErrName, s)
	}
	if hasReference {
		for segment := range strings.SplitSeq(reference, "/") {
			if !validSegment(segment) {
				return "", fmt.Errorf("%w %q: use application[/reference], segments of A-Z a-z 0-9 . _ : -", ErrName, s)
			}
		}
	}
	return Name(s), nil
}

func validSegment(s string) bool {
	if s == "" || s == "." || s == ".." {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case 'A' <= c && c <= 'Z', 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		case c == '.', c == '_', c == ':', c == '-':
		default:
			return false
		}
	}
	return true
}

// Namespace returns the first segment of n.
func (n Name) Namespace() string {
	namespace, _, _ := strings.Cut(string(n), "/")
	return namespace
}

// IsModule reports whether n is a module key: a name of one segment.
func (n Name) IsModule() bool { return !strings.Contains(string(n), "/") }

// Version is one generation of key material, counted from 1. Zero means "the current one".
type Version uint32

// Ref is a key name with an optional version, written NAME or NAME@VERSION.
type Ref struct {
	Name    Name
	Version Version
}

// MaxRef is the length of the longest written Ref in bytes.
const MaxRef = MaxName + 1 + 10

// ParseRef parses NAME or NAME@VERSION. Errors wrap ErrName.
func ParseRef(s string) (Ref, error) {
	name, version, hasVersion := strings.Cut(s, "@")
	n, err := ParseName(name)
	if err != nil {
		return Ref{}, err
	}
	if !hasVersion {
		return Ref{Name: n}, nil
	}
	v, err := strconv.ParseUint(version, 10, 32)
	if err != nil || v == 0 || version[0] == '0' || version[0] == '+' {
		return Ref{}, fmt.Errorf("%w %q: the version after @ is a whole number from 1", ErrName, s)
	}
	return Ref{Name: n, Version: Version(v)}, nil
}

// String returns the written form of r.
func (r Ref) String() string {
	if r.Version == 0 {
		return string(r.Name)
	}
	return string(r.Name) + "@" + strconv.FormatUint(uint64(r.Version), 10)
}

func parse[T ~string](s string, known []T, sentinel error) (T, error) {
	if slices.Contains(known, T(s)) {
		return T(s), nil
	}
	return "", fmt.Errorf("%w %q", sentinel, s)
}
