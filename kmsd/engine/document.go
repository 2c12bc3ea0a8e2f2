package engine

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"github.com/kmsd-project/kmsd/keystore"
)

// The data of a document is one JSON object with a member "format", which is read strictly: what a later release has written there is not
// overlooked, and so not lost when the document is written again.

// decodeDocument decodes a document into v, a struct for this format. Errors wrap keystore.ErrDamaged or ErrUnsupported.
func decodeDocument(d *keystore.Document, format int, v any) error {
	var probe struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(d.Data, &probe); err == nil && probe.Format != format {
		return fmt.Errorf("%w: document %s/%s in format %d: use the release of kmsd that wrote it, or a later one", ErrUnsupported, d.Kind, d.Name, probe.Format)
	}
	decoder := json.NewDecoder(bytes.NewReader(d.Data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(v); err != nil || decoder.Decode(&struct{}{}) != io.EOF {
		return fmt.Errorf("%w: document %s/%s", keystore.ErrDamaged, d.Kind, d.Name)
	}
	return nil
}

// document makes the change that writes v under a name, based on a revision, 0 to create it.
func document(kind, name string, revision uint64, v any, bump bool) (keystore.DocumentChange, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return keystore.DocumentChange{}, fmt.Errorf("%w: document %s/%s: %w", ErrInternal, kind, name, err)
	}
	return keystore.DocumentChange{Document: keystore.Document{Kind: kind, Name: name, Data: data, Revision: revision}, Bump: bump}, nil
}

// allDocuments calls f with every document of a kind.
//
// Invariant: a document that cannot be read ends it with an error: what is not in the list may be a revocation.
func (u *use) allDocuments(kind string, f func(*keystore.Document) error) error {
	for after := []byte(nil); ; {
		page, next, err := u.store.Documents(kind, after, MaxPage)
		if err != nil {
			return err
		}
		for i := range page {
			if err := f(&page[i]); err != nil {
				return err
			}
		}
		if after = next; after == nil {
			return nil
		}
	}
}
