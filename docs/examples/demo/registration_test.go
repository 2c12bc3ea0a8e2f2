package main

import "testing"

// TestDataHaveTheSizeOfARealRegistration keeps the demo honest about "multi-megabyte".
func TestDataHaveTheSizeOfARealRegistration(t *testing.T) {
	data, err := makeData()
	if err != nil {
		t.Fatal(err)
	}
	if len(data) < 3e6 || len(data) > 12e6 {
		t.Errorf("the data are %s", megabytes(len(data)))
	}
}
