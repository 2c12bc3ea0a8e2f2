import java.io.*;
import java.math.BigInteger;
import java.nio.file.*;
import java.security.*;
import java.security.cert.*;
import java.security.spec.*;
import java.util.*;
import javax.crypto.*;
import javax.crypto.spec.*;
import org.bouncycastle.asn1.x500.X500Name;
import org.bouncycastle.cert.jcajce.*;
import org.bouncycastle.operator.jcajce.*;
import org.bouncycastle.jce.provider.BouncyCastleProvider;

// Stores writes PKCS#12 keystores with many entries into a directory, by the JDK and by BouncyCastle, and beside each what is in it:
// one line for each entry, "alias kind SHA-256", over PKCS#8 or the bytes of the key.
public class Stores {
    static X509Certificate certificate(KeyPair pair, String name, String algorithm) throws Exception {
        X500Name subject = new X500Name("CN=" + name);
        Date from = new Date(1700000000000L), to = new Date(1900000000000L);
        return new JcaX509CertificateConverter().getCertificate(new JcaX509v3CertificateBuilder(subject, BigInteger.valueOf(-7), from, to, subject, pair.getPublic())
            .build(new JcaContentSignerBuilder(algorithm).build(pair.getPrivate())));
    }

    static String hash(byte[] b) throws Exception {
        return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(b));
    }

    public static void main(String[] args) throws Exception {
        Path dir = Path.of(args[0]);
        char[] password = args[1].toCharArray();
        KeyPairGenerator rsa = KeyPairGenerator.getInstance("RSA");
        rsa.initialize(2048);
        KeyPairGenerator ec = KeyPairGenerator.getInstance("EC");
        ec.initialize(new ECGenParameterSpec("secp256r1"));
        KeyPair[] pairs = {rsa.generateKeyPair(), rsa.generateKeyPair(), ec.generateKeyPair()};
        String[] signers = {"SHA256withRSA", "SHA256withRSA", "SHA256withECDSA"};
        for (String name : new String[] {"jdk", "jdk-legacy", "bc"}) {
            if (name.equals("jdk-legacy")) System.setProperty("keystore.pkcs12.legacy", "");
            else System.clearProperty("keystore.pkcs12.legacy");
            KeyStore store = name.equals("bc") ? KeyStore.getInstance("PKCS12", new BouncyCastleProvider()) : KeyStore.getInstance("PKCS12");
            store.load(null, password);
            StringBuilder lines = new StringBuilder();
            for (int i = 0; i < pairs.length; i++) {
                String alias = UUID.randomUUID().toString();
                X509Certificate c = certificate(pairs[i], name + i, signers[i]);
                store.setKeyEntry(alias, pairs[i].getPrivate(), password, new java.security.cert.Certificate[] {c});
                lines.append(alias + " private " + hash(pairs[i].getPrivate().getEncoded()) + " " + hash(c.getEncoded()) + "\n");
            }
            if (!name.equals("bc")) {
                KeyGenerator aes = KeyGenerator.getInstance("AES");
                aes.init(256);
                SecretKey key = aes.generateKey();
                String alias = UUID.randomUUID().toString();
                store.setEntry(alias, new KeyStore.SecretKeyEntry(key), new KeyStore.PasswordProtection(password));
                lines.append(alias + " secret " + hash(key.getEncoded()) + " -\n");
            }
            try (OutputStream out = Files.newOutputStream(dir.resolve(name + ".p12"))) {
                store.store(out, password);
            }
            Files.writeString(dir.resolve(name + ".txt"), lines);
        }
    }
}
