package recovery_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/enclave/recovery"
)

func TestConformanceKey(t *testing.T) {
	enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
		text := recovery.NewKey().Text()
		return enclavetest.Device{
			Open: func(t *testing.T) enclave.Enclave {
				k, err := recovery.ParseKey(text)
				if err != nil {
					t.Fatal(err)
				}
				return recovery.ForKey(k)
			},
			Auth:  enclave.Auth{Secret: text},
			Wrong: []enclave.Auth{{Secret: recovery.NewKey().Text()}, {Secret: []byte("1234")}, {Secret: text[:20]}},
		}
	})
}

func TestConformanceShares(t *testing.T) {
	enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
		key, shares, err := recovery.Split(2, 3)
		if err != nil {
			t.Fatal(err)
		}
		text := key.Text()
		a, b, c := shares[0].Text(), shares[1].Text(), shares[2].Text()
		return enclavetest.Device{
			Open: func(t *testing.T) enclave.Enclave {
				k, err := recovery.ParseKey(text)
				if err != nil {
					t.Fatal(err)
				}
				return recovery.ForShares(k, 2, 3)
			},
			Auth: enclave.Auth{Shares: [][]byte{c, a}},
			Wrong: []enclave.Auth{
				{Shares: [][]byte{b}},
				{Shares: [][]byte{b, b}},
				{Shares: [][]byte{b, text}},
				{Shares: [][]byte{a, b}, Secret: text},
				{Shares: make([][]byte, 1000)},
			},
		}
	})
}

func TestTheKeyOfASplitSetOpensItsSlot(t *testing.T) {
	key, shares, err := recovery.Split(3, 4)
	if err != nil {
		t.Fatal(err)
	}
	text := key.Text()
	d := recovery.ForShares(key, 3, 4)
	blob, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	if info := d.Info(); info.Binding != key.ID() || !strings.Contains(info.Level, "3 of 4") || !info.NeedsYou {
		t.Errorf("info %+v", info)
	}
	if id, threshold, err := recovery.Owner(blob); err != nil || id != shares[0].ID() || threshold != 3 {
		t.Errorf("owner %s, %d, %v", id, threshold, err)
	}
	d.Close()
	dst := make([]byte, enclave.SecretSize)
	if err := recovery.New().Unwrap(t.Context(), blob, []byte("aad"), enclave.Auth{Secret: text}, dst); err != nil {
		t.Error(err)
	}
}

func TestUnlockDriverCannotEnrol(t *testing.T) {
	_, err := recovery.New().Wrap(t.Context(), make([]byte, enclave.SecretSize), nil)
	if !errors.Is(err, enclave.ErrUnsupported) {
		t.Fatal(err)
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	k, _, err := recovery.Split(2, 3)
	if err != nil {
		t.Fatal(err)
	}
	_, others, err := recovery.Split(2, 3)
	if err != nil {
		t.Fatal(err)
	}
	blob, err := recovery.ForShares(k, 2, 3).Wrap(t.Context(), make([]byte, enclave.SecretSize), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, a := range map[string]enclave.Auth{
		"nothing":        {},
		"another key":    {Secret: recovery.NewKey().Text()},
		"a typing error": {Secret: bytes.Replace(recovery.NewKey().Text(), []byte("K"), []byte("U"), 1)},
		"another set":    {Shares: [][]byte{others[0].Text(), others[1].Text()}},
		"one share":      {Shares: [][]byte{others[0].Text()}},
	} {
		var e *enclave.Error
		err := recovery.New().Unwrap(context.Background(), blob, nil, a, make([]byte, enclave.SecretSize))
		if !errors.As(err, &e) || e.Remedy == "" {
			t.Errorf("%s: %v has no remedy", name, err)
			continue
		}
		for _, s := range append(a.Shares, a.Secret) {
			if len(s) > 0 && strings.Contains(err.Error()+e.Remedy, string(s)) {
				t.Errorf("%s: the error holds the secret", name)
			}
		}
	}
}

// A slot that the first release enrolled opens for ever.
func TestGoldenBlob(t *testing.T) {
	const (
		text = "K4939AR-YD0000T-23GV50T-TM4KTW0-D5V874S-4XNAVW1-9MEYXFR-W2844B1"
		blob = "CHJlY292ZXJ5ARI0q80AAHw7rFBHe2qiiECQ6yk2Zgi4HkNof6ndOXskdllGTTSgmiGMub+UIq2YioF4hfZaxxzQ9LqlVuXFAem0VwCYPG3L7Yo77xQ/8XRTTyZp6Y4Q4xH/20dgMdEAd9rjZVcDBbqG7LsYgrZ2wQEzkA=="
		aad  = "kmsd slot v1 golden uuid!"
	)
	raw, err := base64.StdEncoding.DecodeString(blob)
	if err != nil {
		t.Fatal(err)
	}
	dst := make([]byte, enclave.SecretSize)
	if err := recovery.New().Unwrap(t.Context(), raw, []byte(aad), enclave.Auth{Secret: []byte(text)}, dst); err != nil {
		t.Fatal(err)
	}
	if string(dst) != "the slot secret of golden tests!" {
		t.Fatalf("%q", dst)
	}
}

func FuzzUnwrap(f *testing.F) {
	k := recovery.NewKey()
	auth := enclave.Auth{Secret: k.Text()}
	enclavetest.Fuzz(f, recovery.ForKey(k), auth)
}
