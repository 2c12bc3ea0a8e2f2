package main

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"io"
	"math"
	"time"
)

// resident is the person of the demo.
const resident = "Amina Okonkwo-Lindqvist"

// makeData returns what a registration client collects of one resident: a zip of images and JSON of the usual size.
func makeData() ([]byte, error) {
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	add := func(name string, content []byte) error {
		// Images do not get smaller by a second compression, and the JSON is small.
		w, err := z.CreateHeader(&zip.FileHeader{Name: name, Method: zip.Store, Modified: time.Date(2026, 11, 2, 9, 30, 0, 0, time.UTC)})
		if err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	}
	identity, err := json.MarshalIndent(map[string]any{
		"identity": map[string]any{
			"fullName":             []map[string]string{{"language": "eng", "value": resident}},
			"dateOfBirth":          "1988/04/17",
			"gender":               []map[string]string{{"language": "eng", "value": "Female"}},
			"addressLine1":         []map[string]string{{"language": "eng", "value": "14 Harbour Road"}},
			"region":               []map[string]string{{"language": "eng", "value": "Northern Coast"}},
			"postalCode":           "14022",
			"phone":                "+00 555 010 4477",
			"email":                "amina@example.org",
			"proofOfAddress":       map[string]string{"value": "proofOfAddress", "type": "Rental contract", "format": "jpg"},
			"individualBiometrics": map[string]any{"format": "cbeff", "version": 1.0, "value": "individualBiometrics_bio_CBEFF"},
		},
	}, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := add("ID.json", identity); err != nil {
		return nil, err
	}
	for i, document := range []string{"proofOfAddress", "proofOfIdentity", "proofOfRelationship"} {
		page, err := scan(1240, 1754, uint64(i))
		if err != nil {
			return nil, err
		}
		if err := add(document+".jpg", page); err != nil {
			return nil, err
		}
	}
	portrait, err := scan(960, 1280, 77)
	if err != nil {
		return nil, err
	}
	if err := add("face.jpg", portrait); err != nil {
		return nil, err
	}
	for i := range 10 {
		finger, err := ridges(400, 500, uint64(100+i))
		if err != nil {
			return nil, err
		}
		if err := add(fmt.Sprintf("finger-%d.png", i+1), finger); err != nil {
			return nil, err
		}
	}
	for i := range 2 {
		iris, err := ridges(640, 480, uint64(200+i))
		if err != nil {
			return nil, err
		}
		if err := add(fmt.Sprintf("iris-%d.png", i+1), iris); err != nil {
			return nil, err
		}
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// makePacket puts the data, their signature and a description of the packet together.
func makePacket(data, signature []byte) ([]byte, error) {
	digest := sha256.Sum256(data)
	meta, err := json.MarshalIndent(map[string]any{
		"registrationId": "10001110011000120261102093000", "process": "NEW", "source": module,
		"centerId": "10001", "machineId": "110011", "resident": resident,
		"dataSha256": hex.EncodeToString(digest[:]), "signatureFile": "data.sig",
	}, "", "  ")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for _, file := range []struct {
		name    string
		content []byte
	}{{"packet_meta_info.json", meta}, {"data.zip", data}, {"data.sig", signature}} {
		w, err := z.CreateHeader(&zip.FileHeader{Name: file.name, Method: zip.Store})
		if err != nil {
			return nil, err
		}
		if _, err := io.Copy(w, bytes.NewReader(file.content)); err != nil {
			return nil, err
		}
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// grain is the noise of a camera: reproducible, and as hard to compress as the real one.
type grain struct {
	seed, counter uint64
	left          []byte
}

func (g *grain) next() int {
	if len(g.left) == 0 {
		var in [16]byte
		binary.LittleEndian.PutUint64(in[:], g.seed)
		binary.LittleEndian.PutUint64(in[8:], g.counter)
		g.counter++
		sum := sha256.Sum256(in[:])
		g.left = sum[:]
	}
	b := g.left[0]
	g.left = g.left[1:]
	return int(b)
}

// scan draws a page or a portrait with soft shades and grain, as JPEG.
func scan(width, height int, seed uint64) ([]byte, error) {
	img := image.NewGray(image.Rect(0, 0, width, height))
	g := &grain{seed: seed}
	for y := range height {
		for x := range width {
			shade := 150 + 50*math.Sin(float64(x)/90+float64(seed)) + 30*math.Cos(float64(y)/70)
			img.SetGray(x, y, color.Gray{Y: clamp(int(shade) + g.next()/8 - 16)})
		}
	}
	var b bytes.Buffer
	err := jpeg.Encode(&b, img, &jpeg.Options{Quality: 90})
	return b.Bytes(), err
}

// ridges draws the lines of a finger or an iris, as PNG.
func ridges(width, height int, seed uint64) ([]byte, error) {
	img := image.NewGray(image.Rect(0, 0, width, height))
	g := &grain{seed: seed}
	for y := range height {
		for x := range width {
			dx, dy := float64(x-width/2), float64(y-height/2)
			wave := math.Sin(math.Sqrt(dx*dx+dy*dy)/4 + 3*math.Sin(dx/60+float64(seed)))
			img.SetGray(x, y, color.Gray{Y: clamp(128 + int(90*wave) + g.next()/8 - 16)})
		}
	}
	var b bytes.Buffer
	err := (&png.Encoder{CompressionLevel: png.BestSpeed}).Encode(&b, img)
	return b.Bytes(), err
}

func clamp(v int) uint8 { return uint8(max(0, min(255, v))) }
