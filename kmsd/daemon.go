package main

type daemon struct {
	dispatcher
}

func main() {}
