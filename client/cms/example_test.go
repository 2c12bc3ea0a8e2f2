package cms_test

import (
	"context"
	"log"
	"os"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/cms"
)

// A document that a PDF library has prepared for external signing gets the signature of a key in kmsd.
func ExampleSignPDF() {
	ctx := context.Background()
	c, err := client.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	key, err := c.Key(ctx, "DIGITAL_CARD")
	if err != nil {
		log.Fatal(err)
	}
	chain, err := c.Chain(ctx, "DIGITAL_CARD")
	if err != nil {
		log.Fatal(err)
	}
	prepared, err := os.ReadFile("card.pdf")
	if err != nil {
		log.Fatal(err)
	}
	signed, err := cms.SignPDF(key, chain, prepared, cms.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile("card-signed.pdf", signed, 0o644); err != nil {
		log.Fatal(err)
	}
}
