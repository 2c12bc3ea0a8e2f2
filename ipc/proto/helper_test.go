package proto

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
)

// helperBodies returns one of each message between kmsd and a helper, empty.
func helperBodies() []Message {
	return []Message{&HelperOpen{}, &HelperWrap{}, &HelperUnwrap{}, &HelperBlob{}, &HelperLogin{}, &HelperGenerate{}, &HelperDo{}, &HelperReply{}}
}

// fullHelperBodies returns the same with every field set.
func fullHelperBodies() []Message {
	return []Message{
		&HelperOpen{Version: HelperVersion, Kind: "pkcs11", Config: map[string]string{"module": "/usr/lib/m.so"}, PIN: []byte("1234")},
		&HelperWrap{Secret: make([]byte, 32), AAD: []byte("a")},
		&HelperUnwrap{Blob: []byte("b"), AAD: []byte("a"), Auth: []byte("1234"), Shares: [][]byte{{1}, {2}}},
		&HelperBlob{Blob: []byte("b")},
		&HelperLogin{Auth: []byte("1234"), Shares: [][]byte{{1}, {2}}},
		&HelperGenerate{ID: make([]byte, 16), Algorithm: "rsa-2048", Usages: []string{"sign", "decrypt"}, AAD: []byte("a"), File: []byte("pkcs11:object=x")},
		&HelperDo{Blob: []byte("b"), Usage: "decrypt", Scheme: "rsa-oaep-sha256", Digest: true, Input: []byte("i"), Nonce: []byte("n"), AAD: []byte("a"), Bound: []byte("r")},
		&HelperReply{
			Failure: HelperFailure{Kind: "locked-out", Detail: "d", Remedy: "r", Until: 1},
			Info:    HelperInfo{Kind: "k", Level: "l", Binding: "b", NeedsYou: true, Warnings: []string{"w"}, Features: []string{HelperResident}, MaxParallel: 8},
			Blob:    []byte("b"), Secret: []byte("s"), Health: HelperHealth{State: "ready", Until: 1, Detail: "d"},
			SPKI: []byte("p"), Output: []byte("o"), Mechanisms: []HelperMechanism{{Algorithm: "rsa-2048", Usage: "sign", Schemes: []string{"rsa-pss-sha256"}}},
		},
	}
}

func TestHelperMessages(t *testing.T) {
	empty := helperBodies()
	for i, m := range fullHelperBodies() {
		v := reflect.ValueOf(m).Elem()
		for f := range v.NumField() {
			if v.Field(f).IsZero() {
				t.Errorf("%T.%s is not set", m, v.Type().Field(f).Name)
			}
		}
		b, err := AppendParams(nil, m)
		if err != nil {
			t.Fatal(err)
		}
		if err := Decode(b, empty[i]); err != nil || !reflect.DeepEqual(empty[i], m) {
			t.Errorf("%T became %+v, %v", m, empty[i], err)
		}
	}
}

// The largest operation with a resident key fits a frame, and the frame of nothing else has grown with it.
func TestHelperFrames(t *testing.T) {
	largest := &HelperDo{Blob: make([]byte, maxHelperBlob), Usage: "encrypt", Input: make([]byte, MaxHelperData), Nonce: make([]byte, maxHelperNonce),
		AAD: make([]byte, maxAAD), Bound: make([]byte, maxHelperAAD)}
	frame, err := AppendRequest(nil, 1<<64-1, OpHelperDo, largest, &Options{DeadlineMS: 1})
	if err != nil || len(frame) > MaxHelperFrame {
		t.Fatalf("%d bytes, %v", len(frame), err)
	}
	if _, err := ParseRequest(frame[lengthSize:]); err != nil {
		t.Error(err)
	}
	if _, err := AppendRequest(nil, 1, OpHelperWrap, largest, nil); !errors.Is(err, ErrTooLarge) {
		t.Errorf("the same as a wrap: %v", err)
	}
	reply, err := AppendResponse(nil, 1<<64-1, nil, &HelperReply{Output: make([]byte, MaxHelperData)})
	if err != nil || len(reply) > MaxControlFrame {
		t.Errorf("%d bytes, %v", len(reply), err)
	}
	for _, m := range []Message{
		&HelperDo{Input: make([]byte, MaxHelperData+1)}, &HelperDo{AAD: make([]byte, maxAAD+1)}, &HelperDo{Bound: make([]byte, maxHelperAAD+1)},
		&HelperDo{Nonce: make([]byte, maxHelperNonce+1)}, &HelperDo{Blob: make([]byte, maxHelperBlob+1)}, &HelperGenerate{ID: make([]byte, 17)},
		&HelperReply{Output: make([]byte, MaxHelperData+1)}, &HelperReply{Mechanisms: make([]HelperMechanism, maxHelperRows+1)},
	} {
		if _, err := AppendParams(nil, m); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%T: %v", m, err)
		}
	}
}

func FuzzHelperBody(f *testing.F) {
	for i, m := range fullHelperBodies() {
		b, err := AppendParams(nil, m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), b)
	}
	f.Fuzz(func(t *testing.T, n uint8, data []byte) {
		i := int(n) % len(helperBodies())
		m := helperBodies()[i]
		if Decode(data, m) != nil {
			return
		}
		first, err := AppendParams(nil, m)
		if err != nil {
			t.Fatalf("%T was read but cannot be written: %v", m, err)
		}
		m2 := helperBodies()[i]
		if err := Decode(first, m2); err != nil {
			t.Fatalf("%T was written but cannot be read: %v", m, err)
		}
		second, err := AppendParams(nil, m2)
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("%T\n%x\n%x\n%v", m, first, second, err)
		}
	})
}
